"""From a container's config and its image to the config.json of its bundle, and back."""

import os
from collections.abc import Mapping

import msgspec

from limpet.engine.starters.choices import choose_args, choose_user, merge_environment
from limpet.engine.starters.contract import Launch
from limpet.recovery.files import read_small_file
from limpet.schema.errors import StateDirectoryError
from limpet.schema.layout import BUNDLE_VARIABLE, CONFIG_BYTES, CONFIG_FILE, ROOTFS, WORKING
from limpet.schema.runtime_spec import ProcessSpec, Root, Spec


def make_spec(launch: Launch, environment: Mapping[str, str]) -> Spec:
    """Return what is to be run; `environment` is the host's. Raises InvalidInputError."""
    config, image = launch.metadata.config, launch.metadata.image_manifest
    default_directory = os.path.join(launch.bundle_path, WORKING) if image.is_builtin else "/"
    return Spec(
        process=ProcessSpec(
            args=choose_args(image.config, config),
            env=merge_environment(environment, image.config, config, {BUNDLE_VARIABLE: launch.bundle_path}),
            cwd=config.working_dir or image.config.working_dir or default_directory,
            user=choose_user(image.config, config),
        ),
        root=Root(path="" if image.is_builtin else os.path.join(launch.bundle_path, ROOTFS)),
    )


def read_spec(bundle_path: str) -> Spec:
    """Return what `make_spec` made, as the bundle has it. Raises StateDirectoryError if it is damaged or gone."""
    path = os.path.join(bundle_path, CONFIG_FILE)
    try:
        return msgspec.json.decode(read_small_file(path, CONFIG_BYTES), type=Spec)
    except OSError as error:
        raise StateDirectoryError(f"bundle {bundle_path}: {error.strerror} ({error.filename or path})") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StateDirectoryError(f"{path} is damaged: {error}; release the container and make it anew") from error
