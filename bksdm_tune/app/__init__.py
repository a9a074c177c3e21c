"""The Gradio app: views over the functions that the command line calls."""
