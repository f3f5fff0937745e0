"""The ops: one file each, with the public function, its torch reference, its constraints and its registration."""
