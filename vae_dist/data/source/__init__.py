"""Where text comes from: files of many kinds to texts, in pieces that can be read apart."""
