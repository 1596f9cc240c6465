%% A fake of the host's tier servers: one is registered under its tier's name and knows its
%% root. When it starts, it deletes from that what is no file of the host's; so does a load.
-module(erllama_cache_disk_srv).
-behaviour(gen_server).

-export([dir/1]).
-export([start/2, start_link/2, load/2]).
-export([init/1, handle_call/3, handle_cast/2]).

-define(CORRUPT_FILES, 10).

-spec dir(atom()) -> file:name_all().
dir(TierSrv) ->
    erllama_fake:call(dir, [TierSrv], fun() -> gen_server:call(TierSrv, dir) end).

%%% For tests. None of these is logged.

-spec start(atom(), file:name_all()) -> {ok, pid()}.
start(TierSrv, Root) ->
    {ok, _} = gen_server:start({local, TierSrv}, ?MODULE, Root, []).

-spec start_link(atom(), file:name_all()) -> {ok, pid()} | {error, term()}.
start_link(TierSrv, Root) ->
    erllama_fake:start_link(TierSrv, ?MODULE, Root).

%% Loads a key as the host does, in the server.
-spec load(atom(), <<_:256>>) ->
    {ok, erllama_fake_kvc:info(), binary()} | miss | {error, erllama_fake_kvc:reason()}.
load(TierSrv, Key) ->
    gen_server:call(TierSrv, {load, Key}, infinity).

init(Root) ->
    %% What is not there yet has nothing to be swept.
    case file:list_dir(Root) of
        {ok, Names} ->
            lists:foreach(fun(Name) -> sweep(filename:join(Root, Name)) end, Names);
        {error, _} ->
            ok
    end,
    {ok, Root}.

handle_call(dir, _From, Root) ->
    {reply, Root, Root};
handle_call({load, Key}, _From, Root) ->
    Name = <<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>,
    Path = filename:join(Root, Name),
    case erllama_fake_kvc:read(Path) of
        {ok, _, _} = Loaded ->
            {reply, Loaded, Root};
        {error, enoent} ->
            {reply, miss, Root};
        {error, _} = Error ->
            _ = file:delete(Path),
            ok = erllama_cache_counters:add(?CORRUPT_FILES),
            {reply, Error, Root}
    end.

handle_cast(_Request, Root) ->
    {noreply, Root}.

sweep(Path) ->
    case filename:extension(Path) of
        ".tmp" ->
            file:delete(Path);
        ".kvc" ->
            case erllama_fake_kvc:read(Path) of
                {ok, _, _} -> ok;
                {error, _} -> file:delete(Path)
            end;
        _ ->
            ok
    end.
