"""Ids of the special tokens: the same in every tokenizer, data set and model."""

PAD_ID, BOS_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
