%% Stands in for the host's tier servers: one is registered under its tier's name and knows its
%% root.
-module(erllama_cache_disk_srv).
-behaviour(gen_server).

-export([dir/1]).
-export([start/2]).
-export([init/1, handle_call/3, handle_cast/2]).

-spec dir(atom()) -> file:name_all().
dir(TierSrv) ->
    erllama_standin:call(dir, [TierSrv], fun() -> gen_server:call(TierSrv, dir) end).

-spec start(atom(), file:name_all()) -> {ok, pid()}.
start(TierSrv, Root) ->
    {ok, _} = gen_server:start({local, TierSrv}, ?MODULE, Root, []).

init(Root) ->
    {ok, Root}.

handle_call(dir, _From, Root) ->
    {reply, Root, Root}.

handle_cast(_Request, Root) ->
    {noreply, Root}.
