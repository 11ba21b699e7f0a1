"""From a context and a soft prompt to a reply: sampling rules, the decoding loop, the batching engine, cut replies."""
