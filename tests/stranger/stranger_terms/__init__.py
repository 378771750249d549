"""Terms for weftlora that another package brings. Nothing of weftlora knows it."""
