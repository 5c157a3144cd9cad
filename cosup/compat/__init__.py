"""Other libraries' calls on cosup's losses: change the import, keep the call. docs/moving.md says what differs."""
