"""What is done to requests on the way: drivers that show their child's bytes and change how it is used."""
