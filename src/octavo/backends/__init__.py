"""The only door to hardware. Import the backend you want: each brings dependencies of its own."""
