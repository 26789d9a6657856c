"""Engines in other processes, here or on other machines, which die and are replaced.

    this process: the fleet's router                      another process: an engine
    RemoteLoop --commands--> EngineLink ----------------> EngineHost --tickets--> EngineLoop
    Mirror     <----news---- (Ray Serve's handle) <------ tokens, positions, what predictions are made from

messages  what is sent
link      how an engine is reached, and what is raised when it is not
host      the engine's side
mirror    tickets and the engine, as this side sees them
loop      this side: hands tickets over, and those of an engine that died back
ray_serve a plan as deployments of Ray Serve, one for each engine
"""
