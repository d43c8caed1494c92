"""One module for each revision, oldest first. A revision never imports live code: it must stay what it was."""
