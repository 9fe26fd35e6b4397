"""From chats to token ids and back."""
