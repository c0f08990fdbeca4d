"""To and from the files of other libraries: Hugging Face folders, and adapters as peft loads them."""
