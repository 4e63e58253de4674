"""Lightning attention and its decoding step for GPUs, in CUDA C++ that is compiled at run time."""
