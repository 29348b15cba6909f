"""`tg.function`: the tape, compiled once and replayed.

recording   listens to one call of a function, and writes down every primitive.
program     what it wrote: the list of steps. The only intermediate representation there is.
shorthands  primitives that save calls or launches, written out.
rewrites    the same values by fewer or better steps: nothing twice, nothing in vain, writes last.
simplify    the table of rewrites that can be switched off, in their order:
handwritten what people write by hand, replaced by the fused primitives; patterns finds it;
algebra     small identities;
chains      on a GPU, elementwise steps gathered into one kernel each;
learning_rates  on a CPU, multiplied into what all gradients are made of;
updates     on a GPU, weights that the product of their gradient updates;
epilogues   on a GPU, products that do what comes after them: masks of ReLUs, sums of columns;
layout      how values of small networks are stored.
gradients   where an optimiser gathers them, to be computed there at once, and for which update.
lowering    steps as calls of NumPy into planned memory: elementwise_calls, shape_calls,
            matrix_calls, softmax_calls and update_calls say by which, and own_calls has those
            that NumPy has not.
blocks      runs of elementwise calls on large arrays, block by block over threads.
memory      which arrays lie where in one arena.
replay      the text of a program as one Python function, and its running.
lease       results in the program's own memory, for who asks for it.
schedule    on a GPU: the order of a program's steps on two branches, and who waits for whom.
lookups     on a GPU: indices that a program computes, kept in range; who tells of others.
device      their launching, one by one or as a CUDA graph.
graphs      the capture of CUDA graphs, and their memory.
checking    a function and its replay, run from the same state and compared.
matching    whether a call has the signature of the one before.
dispatch    signatures, programs, when to record and when to replay.
"""

from tapegrad._function.dispatch import Function, function

__all__ = ["Function", "function"]
