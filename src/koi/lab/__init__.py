"""Built on top of Koi as a user would: runs, cards, the command line, the page to play with."""
