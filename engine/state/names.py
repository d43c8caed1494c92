"""The names in a state directory.

lock            locked with flock(2) while an engine or a writing store is open; never removed
directory.json  which directory this is, so that a copy is told from the original
owner.json      its last owner: the epoch, and whether the database was closed cleanly
store.db        the database, with its -wal and -shm next to it while it is open
containers/     a bundle for each container        sandboxes/   a directory for each sandbox
images/         the image store                    quarantine/  entries without an owner
backups/        copies made before a migration   keeper/      the keeper's lock, socket, journal and pipes
control/        the socket by which commands reach the engine
oci/            what OCI runtimes keep of their containers, by starter and boot; in a bundle, what conmon does
"""

DATABASE = "store.db"
CONTAINERS = "containers"
SANDBOXES = "sandboxes"
IMAGES = "images"
QUARANTINE = "quarantine"
BACKUPS = "backups"
LOCK = "lock"
OWNER = "owner.json"
IDENTITY = "directory.json"
KEEPER = "keeper"
CONTROL = "control"
OCI = "oci"
FILES = {DATABASE, DATABASE + "-wal", DATABASE + "-shm", DATABASE + "-journal", LOCK, OWNER, IDENTITY}
_DIRECTORIES = {CONTAINERS, SANDBOXES, IMAGES, QUARANTINE, BACKUPS, KEEPER, CONTROL, OCI}
OURS = FILES | _DIRECTORIES
"""All names that limpet makes there."""
ENTRIES = dict.fromkeys(FILES, False) | dict.fromkeys(_DIRECTORIES, True)
"""Whether each entry is a directory."""
