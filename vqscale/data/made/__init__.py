"""What shards are made of here: pictures drawn by arithmetic, files as they are, squares of photographs."""
