"""The node's products as Triton kernels, for GPUs.

`products` is what the node calls where `weftlora.kernel.switches.triton_runs` says so; `launches` has the kernels' blocks and grids;
`kernels` are the kernels. Only the last two import triton, when a kernel is first launched.
"""
