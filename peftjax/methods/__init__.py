"""The methods, one file each: methods/<family>/<name>.py."""
