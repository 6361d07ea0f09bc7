"""Other packages' implementations beside the ones here."""
