"""The method: the bank of soft prompts, the retriever, the losses, and the frozen LM behind them."""
