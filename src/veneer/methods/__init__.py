"""One small file a method; `veneer.method.config_class` finds them by themselves."""
