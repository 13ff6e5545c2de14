"""The recipes that come with smalti; each YAML file in this folder is one."""
