"""An exported engine, or a student or teacher in torch, behind OpenAI's images API."""
