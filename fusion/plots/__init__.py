"""Pictures: waterline, efficiency gap, throughput of blocks, tensor-machine diagrams. matplotlib is imported when used."""
