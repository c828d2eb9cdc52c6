"""Problems with rewards that can be checked: the smallest ones ship with the library."""
