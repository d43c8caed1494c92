"""The OCI starter: containers made by runc or crun, each under a conmon that sees its end.

Read `starter` (what the engine calls), `starts` and `conmon` (how a container is made), `spec` (what is to be run),
`exits` (how it ended), `ends` (how all that it has is ended), then `probe` (what is seen after a restart).
"""

from limpet.engine.starters.oci.starter import OciStarter

__all__ = ["OciStarter"]
