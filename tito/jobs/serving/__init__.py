"""What `tito serve` is made of: text, engine (no HTTP), the forms of requests and answers, and the routes."""
