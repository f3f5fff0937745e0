"""The networks of LTX-2.3 and what goes into and comes out of them."""
