"""The gRPC interface: .proto files, what is generated from them, and the generator."""
