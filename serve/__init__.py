"""A Ray Serve application for distilled models: OpenAI's images API, with a page to try it.

This package is reached as `serve.app:build` from the checkout. Ray's own is always imported as
`from ray import serve as ray_serve`, so that the two names never meet.
"""
