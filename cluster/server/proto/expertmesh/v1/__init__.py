"""Version 1 of the published protocol. All but this file and the .proto files is generated."""
