"""What shards are made of here: what is drawn by arithmetic, files as they are, squares of photographs."""
