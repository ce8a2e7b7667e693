"""Reference Linen models whose hook methods an interceptor can see."""
