"""The commands, one file each (or a few that belong together). `finetune.cli.app` imports a file when it is called."""
