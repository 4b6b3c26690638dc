"""Pictures of what the student built. Written by hand, not built from a lesson; nothing else imports this room."""
