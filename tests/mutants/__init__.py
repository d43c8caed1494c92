"""Small changes to limpet's code, one at a time: the tests must notice them."""
