"""What `tito serve` is made of: engine (no HTTP), the forms of requests and answers, and the routes."""
