"""The keeper: small processes that outlive an engine, and see the ends and the output of its containers."""
