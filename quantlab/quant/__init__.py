"""The quantization engine: blocks one by one, Hessians gathered once, every recipe solved from them. The methods are in
``quantlab.registry.methods``.
"""
