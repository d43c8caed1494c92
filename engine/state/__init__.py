"""The state directory: its entries, its owner, and how its files survive a power cut."""
