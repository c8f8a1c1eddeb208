"""stabrun: how high can the learning rate go before this model diverges?"""

__version__ = "0.1.0"
