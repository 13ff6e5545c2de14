"""Published checkpoints of other systems: reading their files, recognising their layouts, importing and exporting."""
