"""From a registered draft to an EngineBuild: a digest-named folder that an engine has loaded once before anybody serves it."""
