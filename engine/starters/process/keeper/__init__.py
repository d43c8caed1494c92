"""The keeper: small processes that start the containers of one state directory, and see how they end.

It runs without limpet: standard library only, nothing imported from outside this folder. Read `main` (the processes),
`keeper` (what is asked, and what ends), `starts` (from a gate to a program), `gate` (what a container's process is
before that), `members` (what else belongs to a container), `journal` (what survives), `adoption` (what the next keeper
makes of it), `messages` (what engine and keeper say to each other).
"""
