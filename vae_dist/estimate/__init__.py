"""What a run costs, from its configuration alone: FLOPs, memory, communication, time, goodput. All of it estimates.

trace       one micro-batch on tensors without data -> FLOPs and bytes of activations
memory      weights, gradients, optimizer state, buffers of a device at each ZeRO stage
devices     what a device can do, from data sheets
timing      seconds of a step, its communication, a checkpoint
goodput     the share of the time that is work where devices fail, and when to save
forecast    all of it for one configuration, whether it fits, and the nearest one that does
view        the forecast as lines for people
"""
