%% Stands in for the host's tier server.
-module(erllama_cache_disk_srv).
-export([dir/1]).

-spec dir(atom()) -> file:name_all().
dir(TierSrv) -> gen_server:call(TierSrv, dir).
