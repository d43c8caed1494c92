"""The keeper: small processes that start the containers of one state directory, and see how they end.

It runs without limpet: standard library only, nothing imported from outside this folder. Read `main` (the processes),
`keeper` (the loop), `gate` (what a container's process is before it is the container's program), `journal` (what
survives), `messages` (what engine and keeper say to each other).
"""
