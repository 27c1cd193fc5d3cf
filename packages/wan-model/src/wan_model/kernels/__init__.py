"""Triton kernels of the operations between matrix products, each one pass over memory for a whole pack.

They compute in fp32 and read and write the precision of their inputs. Values of a sample, such as its modulation, are
looked up by token, so the number of launches does not depend on the number of samples. Sums over tokens are added in a
fixed order, so gradients are the same to the bit in every run.

``wan_model.dit.elementwise`` calls them on CUDA. On a CPU the same kernels run in Triton's interpreter, which is for
tests: they are compared there with the formulae.
"""
