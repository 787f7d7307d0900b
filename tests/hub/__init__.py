"""A small Hub on the loopback interface: repositories in memory, the Hub's protocol over HTTP, faults on demand."""
