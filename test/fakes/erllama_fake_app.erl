%% The host as an application: its servers, fakes but for the writer, below supervisors like its
%% own.
-module(erllama_fake_app).
-behaviour(application).
-behaviour(supervisor).

-export([load/4]).
-export([start/2, stop/1, init/1]).

%% Loads it under this name, to be started with one tier server, of this name and root, after these
%% applications.
-spec load(atom(), atom(), file:name_all(), After :: [atom()]) -> ok | {error, term()}.
load(Name, TierSrv, Root, After) ->
    application:load({application, Name, [
        {vsn, "0.5.1"}, {modules, []}, {registered, []},
        {applications, [kernel, stdlib | After]}, {mod, {?MODULE, {TierSrv, Root}}}
    ]}).

%% The servers of the cache below a supervisor of their own, in this order, and the tiers' servers,
%% which stop before them, below another.
start(_Type, {TierSrv, Root}) ->
    supervisor:start_link({local, erllama_sup}, ?MODULE, [
        below(erllama_fake_cache_sup, [
            #{id => meta_srv, start => {erllama_cache_meta_srv, start_link, []}},
            #{id => erllama_cache_writer, start => {erllama_cache_writer, start_link, []},
              shutdown => 5000}
        ]),
        below(erllama_fake_tiers_sup, [
            #{id => tier, start => {erllama_cache_disk_srv, start_link, [TierSrv, Root]}}
        ])
    ]).

below(Name, Children) ->
    #{id => Name, type => supervisor,
      start => {supervisor, start_link, [{local, Name}, ?MODULE, Children]}}.

stop(_State) ->
    ok.

init(Children) ->
    {ok, {#{strategy => one_for_one, intensity => 5, period => 30}, Children}}.
