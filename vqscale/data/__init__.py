"""Sources of batches: the order of samples is a pure function, the state of a stream is one number.

What is webdataset's here: how patterns name shards (brace lists and ::), what a URL or a `pipe:` gives (gopen), where
the key of a member ends and its suffix begins, and the writing of tars. What is ours: the index of all samples, their
order over epochs, ranks and workers, reading at an offset, grouping, decoding, batching, and what becomes of a broken
sample. So a run goes on at the exact next sample on any number of processes, which a pipeline of iterators cannot.
"""
